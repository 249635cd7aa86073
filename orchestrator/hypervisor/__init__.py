"""Blades as libvirt domains: the private daemon, domain XML, templates and clones, accelerator."""
