"""`Skeleton`: names of keypoints, and the edges between them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skeleton:
    """Names of the keypoints of an animal, and pairs of their numbers that figures connect.

    `name` is what `.slp` files call the skeleton. Raises ValueError for names that repeat and for
    edges without keypoints.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("no keypoints")
        if len(set(self.names)) != len(self.names):
            raise ValueError("two keypoints have one name")
        if any(not 0 <= end < len(self.names) for edge in self.edges for end in edge):
            raise ValueError("an edge has no keypoint at its end")
