"""Tokenize conversations and decide which tokens are trained."""
