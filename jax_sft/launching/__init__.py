"""Start and restart the processes of a run on one or many hosts.

These modules import only the standard library, not even JAX (`ray_cluster` imports Ray when it is
used). A launcher must start instantly, in any Python that an engine provides.
"""
