"""CALICO: self-supervised camera-LiDAR pre-training for BEV perception (docs/papers/calico.md)."""
