"""One of LightM's networks in a plain PyTorch loop, then over a whole scan with MONAI's sliding window."""

import torch
from monai.inferers import sliding_window_inference

import lightm

network = lightm.network("lightm-small", spatial_dims=3, in_channels=1, out_channels=2)
optimizer = torch.optim.AdamW(lightm.parameter_groups(network, weight_decay=0.01), lr=1e-3)
for _ in range(3):
    image = torch.randn(2, 1, 16, 16, 16)  # (B, C, Z, Y, X), sizes that network.divisor = 8 divides
    loss = torch.nn.functional.cross_entropy(network(image), (image[:, 0] > 0).long())
    optimizer.zero_grad(), loss.backward(), optimizer.step()
with torch.no_grad():
    logits = sliding_window_inference(torch.randn(1, 1, 20, 27, 33), (16, 16, 16), 1, network.eval())
print(f"loss {loss.item():.3f}, logits {tuple(logits.shape)}")
