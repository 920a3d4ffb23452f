"""Networks for video: clips (N, C, T, H, W) in."""
