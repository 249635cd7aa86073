"""SSH between the host and the blades: keys, generated ssh_config, sessions."""
