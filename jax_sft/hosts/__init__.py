"""Several processes as one run: they meet, agree, watch each other and stop together."""
