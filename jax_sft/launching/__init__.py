"""Starting the processes of a run on one or many hosts, and starting them again.

Nothing here imports JAX or anything else that is not in Python itself (`ray_cluster` asks for Ray
when it is used): a launcher has to be up at once, in whatever Python an engine gives it.
"""
