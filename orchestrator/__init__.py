"""Rackless: the host side of a disaggregated rack made of virtual machines."""

__version__ = "0.1.0"
