"""Runs on a GPU that is at hand for minutes only: what is done in which call, and that each call ends by itself."""
