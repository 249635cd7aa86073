"""A rack's network: where it is, its bridges, its taps' shaping, and a way in for the host."""
