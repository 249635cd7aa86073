"""Settings of the unit tests."""

from hypothesis import settings

# No deadline: how fast one example runs says more about the machine than about the code.
settings.register_profile("rackless", max_examples=60, deadline=None)
settings.load_profile("rackless")
