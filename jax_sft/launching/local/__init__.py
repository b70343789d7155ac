"""Start, watch, stop and restart the processes of one host."""
