"""What the families of operators share; it imports none of them."""
