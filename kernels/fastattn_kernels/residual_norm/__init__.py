"""Layer norm and RMS norm, fused with the residual add."""
