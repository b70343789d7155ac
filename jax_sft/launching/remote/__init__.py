"""Launchers on other hosts: by SSH or Ray."""
