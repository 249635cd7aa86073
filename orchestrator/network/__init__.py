"""The rack's own network namespace: bridges, taps' shaping, and a way in for the host."""
