"""Run several processes as one: they join, agree, watch each other and stop together."""
