"""Faults on demand: what is broken on purpose, kept in each blade's libvirt metadata, and undone by `heal`."""
