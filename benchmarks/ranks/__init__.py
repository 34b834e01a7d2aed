"""What attention over several processes waits for, beside what it computes: gloo on this machine."""
