"""What a call costs before its kernel runs: the host's time, its launches, and what the first call compiles."""
