"""Models of other packages, small and with random weights, on this package's attention and norms (``make clients``)."""

from tests.clients import of_diffusers, of_open_clip, of_timm, of_torchvision

CLIENTS = (*of_timm.CLIENTS, *of_torchvision.CLIENTS, *of_open_clip.CLIENTS, *of_diffusers.CLIENTS)
