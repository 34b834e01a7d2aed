"""What is measured: five families, each with its cases, its variants and what defines the right result."""
