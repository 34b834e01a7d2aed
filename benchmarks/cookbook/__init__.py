"""The cookbook: functions on scores and masks to copy, and what holds them to their other forms (docs/cookbook.md)."""
