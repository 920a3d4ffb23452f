"""Point clouds as images for UniRepLKNet: rotate, embed every point by its neighbours, splat, and let a 2-D net look.

X. Ding, Y. Zhang et al., arXiv 2311.15599, section 3.3; the projection is P2P's (Z. Wang et al., NeurIPS 2022,
arXiv 2208.02812). Every cloud gives V views; a view's image is the sum of its points' features over the 3 × 3 cells
around each point, refined by a small convolutional block and mapped to three channels.

Cost: N² distances for the neighbours of N points; V images of ``img_size``² a cloud.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchconv._common import check, check_positive

_QUARTER = math.pi / 4
# Euler angles (x, y, z) of the views, in the order in which ``num_views`` takes them.
VIEW_ANGLES = (
    *((2 * k * _QUARTER, 0.0, 2 * _QUARTER) for k in range(4)),
    *((x * _QUARTER, y * _QUARTER, 2 * _QUARTER) for x in (5, 7) for y in (-1, 1)),
    (0.0, -2 * _QUARTER, 2 * _QUARTER),
    (0.0, 2 * _QUARTER, 2 * _QUARTER),
)
DISTANCE = -1.4
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def rotation_matrices(angles: Tensor) -> Tensor:
    """Rx·Ry·Rz, right-handed, of Euler angles (V, 3) → (V, 3, 3)."""
    cos, sin = angles.cos().unbind(-1), angles.sin().unbind(-1)
    one, zero = torch.ones_like(cos[0]), torch.zeros_like(cos[0])

    def matrix(*entries: Tensor) -> Tensor:
        return torch.stack(entries, -1).unflatten(-1, (3, 3))

    about_x = matrix(one, zero, zero, zero, cos[0], -sin[0], zero, sin[0], cos[0])
    about_y = matrix(cos[1], zero, sin[1], zero, one, zero, -sin[1], zero, cos[1])
    about_z = matrix(cos[2], -sin[2], zero, sin[2], cos[2], zero, zero, zero, one)
    return about_x @ about_y @ about_z


def rotate_views(points: Tensor, num_views: int) -> Tensor:
    """The cloud from ``num_views`` sides: points·Rᵀ moved by 1.4 along z, in float32 (or float64 for float64 points).

    Shape:
        (B, N, 3) → (B·V, N, 3), the view index fastest.
    """
    dtype = torch.promote_types(points.dtype, torch.float32)
    angles = torch.tensor(VIEW_ANGLES[:num_views], dtype=torch.float32, device=points.device).to(dtype)
    rotations = rotation_matrices(angles).transpose(1, 2)
    shift = torch.tensor([0.0, 0.0, DISTANCE], dtype=torch.float32, device=points.device).to(dtype)
    repeated = points.to(dtype).repeat_interleave(num_views, 0)
    return torch.matmul(repeated, rotations.repeat(points.shape[0], 1, 1)) - shift


def nearest(points: Tensor, k: int) -> Tensor:
    """Indices (B, N, k) of the k nearest points of every point of (B, N, 3), itself included, in no order."""
    squared = points.square().sum(-1)
    distances = -2 * torch.matmul(points, points.transpose(1, 2)) + squared[:, :, None] + squared[:, None]
    return distances.topk(k, -1, largest=False, sorted=False).indices


def splat_cells(points: Tensor, size: int) -> Tensor:
    """Index ix·size + iy of the centre cell of every point on a size × size grid, the occupied box centred.

    cell = ⌊(xy − min) / g⌋ + 1, g = max(range_x, range_y) / (size − 3); the shift size/2 − ⌊(max + min)/2⌋ − 1 a axis
    runs over the cells with their 3 × 3 surroundings. The farthest point lies exactly on a cell's edge, so that the
    order of these operations matters.

    Shape:
        (B, N, ≥ 2) → (B, N), integers; neighbours are ±1 and ±size away, all within the grid.
    """
    xy = points[..., :2]
    low, high = xy.amin(1, keepdim=True), xy.amax(1, keepdim=True)
    step = (high - low).amax(-1, keepdim=True) / (size - 3)
    cells = torch.floor((xy - low) / step.clamp_min(torch.finfo(step.dtype).tiny)) + 1
    middle = torch.floor((cells.amax(1, keepdim=True) + cells.amin(1, keepdim=True)) / 2)
    cells = cells + (size // 2 - middle - 1)
    return (cells[..., 0] * size + cells[..., 1]).long()


class BasicBlock(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x)))))), 3 × 3 convolutions without bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class PreNorm(nn.Module):
    """fn(LayerNorm(x))."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and apply."""
        y: Tensor = self.fn(self.norm(x))
        return y


class Attention(nn.Module):
    """Multi-head self-attention whose heads together are wider than the tokens."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, width), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the second axis of (N, tokens, width)."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class FeedForward(nn.Module):
    """linear → GELU → linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        layers = (nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width))
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers."""
        y: Tensor = self.net(x)
        return y


class Transformer(nn.Module):
    """Pre-norm transformer: x + attention, then x + feed-forward, a layer."""

    def __init__(self, width: int, depth: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PreNorm(width, Attention(width, heads, head_width)), PreNorm(width, FeedForward(width, hidden))]
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Transform the tokens ``x``."""
        for pair in self.layers:
            for layer in pair:  # type: ignore[attr-defined]
                x = x + layer(x)
        return x


class MultiViewFusion(nn.Module):
    """Let the views of a cloud see each other: 7 × 7 patches, one transformer layer over all views, back to pixels.

    Args:
        channels: features of a pixel.
        img_size: side of the images, ≥ 7.
        num_views: views of a cloud.

    Shape:
        (B·V, channels, img_size, img_size) → the same.
    """

    width, patch = 128, 7

    def __init__(self, channels: int, img_size: int, num_views: int) -> None:
        super().__init__()
        check(img_size >= self.patch, "img_size", img_size, f"must hold a patch of {self.patch}")
        self.num_views = num_views
        self.conv1 = nn.Conv2d(channels, self.width, self.patch, stride=self.patch, bias=False)
        self.transformer = Transformer(self.width, depth=1, heads=8, head_width=128, hidden=256)
        self.conv2 = nn.Sequential(nn.Conv2d(self.width, channels, 3, padding=1), nn.GELU())
        self.conv3 = nn.Sequential(nn.Conv2d(2 * channels, channels, 1), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        """Fuse the views."""
        patches = self.conv1(x)
        grid = patches.shape[2:]
        tokens = patches.flatten(2).unflatten(0, (-1, self.num_views)).transpose(2, 3).flatten(1, 2)
        tokens = self.transformer(tokens).unflatten(1, (self.num_views, -1)).flatten(0, 1)
        y = F.interpolate(tokens.transpose(1, 2).unflatten(2, grid), size=x.shape[2:])
        fused: Tensor = self.conv3(torch.cat((self.conv2(y), x), 1))
        return fused


class PointProjection(nn.Module):
    """Point clouds → V images each, ready for an ImageNet backbone.

    Every point's feature is the maximum over its neighbours of leaky_relu(GN(W·[f_j − f_i, f_i])), f = linear(xyz),
    then linear; the image is the sum of the features of the points whose 3 × 3 cells cover a pixel.

    Args:
        local_size: neighbours, 1 to the number of points; the point itself is one.
        trans_dim: width of f.
        graph_dim: width after, a multiple of 4.
        img_size: side of the images; the grid is zero-padded to it, so img_size − obj_size is even and ≥ 0.
        obj_size: side of the grid, even and ≥ 4.
        num_views: views, 1 to 10.
        atten_fusion: let the views attend to each other.

    Shape:
        (B, N, 3) → (B·num_views, 3, img_size, img_size), the view index fastest, normalised as ImageNet images.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Reference: arXiv 2311.15599, section 3.3; arXiv 2208.02812.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        local_size: int = 32,
        trans_dim: int = 8,
        graph_dim: int = 64,
        img_size: int = 224,
        obj_size: int = 224,
        num_views: int = 4,
        atten_fusion: bool = False,
    ) -> None:
        super().__init__()
        check_positive("local_size", local_size)
        check_positive("trans_dim", trans_dim)
        check(graph_dim >= 4 and graph_dim % 4 == 0, "graph_dim", graph_dim, "must be a positive multiple of 4")
        check(obj_size >= 4 and obj_size % 2 == 0, "obj_size", obj_size, "must be even, at least 4")
        gap = img_size - obj_size
        check(gap >= 0 and gap % 2 == 0, "img_size", img_size, f"must exceed obj_size={obj_size} by an even number")
        check(1 <= num_views <= len(VIEW_ANGLES), "num_views", num_views, f"must be 1 to {len(VIEW_ANGLES)}")
        self.local_size, self.obj_size, self.img_size, self.num_views = local_size, obj_size, img_size, num_views
        self.input_trans = nn.Conv1d(3, trans_dim, 1)
        edge = nn.Conv2d(2 * trans_dim, graph_dim, 1, bias=False)
        self.graph_layer = nn.Sequential(edge, nn.GroupNorm(4, graph_dim), nn.LeakyReLU(0.2))
        self.proj_layer = nn.Conv1d(graph_dim, graph_dim, 1)
        self.img_block = nn.Sequential(BasicBlock(graph_dim), nn.Conv2d(graph_dim, graph_dim, 1))
        self.fusion = MultiViewFusion(graph_dim, img_size, num_views) if atten_fusion else None
        self.img_layer = nn.Conv2d(graph_dim, 3, 1)
        options: dict[str, Any] = {"persistent": False}
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], **options)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], **options)

    def point_features(self, points: Tensor) -> Tensor:
        """Features (B, graph_dim, N) of the points (B, N, 3)."""
        count = points.shape[1]
        check(self.local_size <= count, "local_size", self.local_size, f"must be at most the {count} points")
        f = self.input_trans(points.transpose(1, 2))
        with torch.no_grad():
            index = nearest(points, self.local_size).flatten(1)[:, None].expand(-1, f.shape[1], -1)
        neighbours = f.gather(2, index).unflatten(2, (count, self.local_size))
        own = f[..., None].expand_as(neighbours)
        edges = self.graph_layer(torch.cat((neighbours - own, own), 1)).amax(-1)
        y: Tensor = self.proj_layer(edges)
        return y

    def view_points(self, points: Tensor) -> Tensor:
        """The rotated clouds (B·num_views, N, 3)."""
        return rotate_views(points, self.num_views)

    def splat(self, features: Tensor, views: Tensor) -> Tensor:
        """Sum the features (B, C, N) at the cells of the views (B·V, N, 3): (B·V, C, obj_size, obj_size)."""
        size = self.obj_size
        cells = splat_cells(views.detach(), size)[:, None].expand(-1, features.shape[1], -1)
        features = features.repeat_interleave(self.num_views, 0)
        grid = features.new_zeros(*features.shape[:2], size * size)
        for dx in (-1, 0, 1):
            for dy in (-1, 0, 1):
                grid = grid.scatter_add(2, cells + (dx * size + dy), features)
        return grid.unflatten(2, (size, size))

    def forward(self, points: Tensor) -> Tensor:
        """Project the clouds ``points``."""
        if points.dim() != 3 or points.shape[-1] != 3:
            raise ValueError(f"points of shape {tuple(points.shape)}: expected (B, N, 3)")
        grid = self.splat(self.point_features(points), self.view_points(points))
        image = self.img_block(F.pad(grid, [(self.img_size - self.obj_size) // 2] * 4))
        if self.fusion is not None:
            image = self.fusion(image)
        return (torch.sigmoid(self.img_layer(image)) - self.mean) / self.std
