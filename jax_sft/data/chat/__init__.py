"""Conversations to tokens, and the decision which tokens train."""
