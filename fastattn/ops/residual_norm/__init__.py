"""Layer norm and RMS norm, alone or fused with the residual add in front of them."""
