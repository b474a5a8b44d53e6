"""A radix tree over token ids whose nodes hold snapshots of caches that have read so far and no further."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config import CacheConfig
from ..snapshots import Snapshot
from .hashing import Tokens, common
from .ranking import Usage

TOKEN_BYTES = 8


@dataclass(frozen=True)
class Origin:
    """Whose state it is: the root of its hashes, the settings of its cache, what its model and calibration are."""

    root: str
    settings: CacheConfig
    model: dict[str, Any] | None
    calibration: str | None = None


@dataclass(eq=False)
class Node:
    """Tokens `start .. end` behind those of the parent; `state` is of a cache that has read all up to `end`.

    hashes: of the node's blocks, the last one being its name.
    base: the node above whose cache it went on from, and whose pages it shares; None if the state has every page.
    croppable: a cache made of the state can go back to fewer tokens.
    users: copies in progress, during which the node stays.
    """

    tokens: Tokens
    hashes: list[str]
    start: int
    parent: Node | None
    usage: Usage
    state: Snapshot | None = None
    origin: Origin | None = None
    base: Node | None = None
    croppable: bool = False
    users: int = 0
    children: dict[str, Node] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.hashes[-1]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def nbytes(self) -> int:
        return (0 if self.state is None else self.state.nbytes) + TOKEN_BYTES * len(self.tokens)

    def path(self) -> list[Node]:
        """From below the root to this node."""
        above = [] if self.parent is None or self.parent.parent is None else self.parent.path()
        return [*above, self]

    def chain(self) -> list[Node]:
        """The nodes whose snapshots make this node's cache, this one last."""
        return [self] if self.base is None else [*self.base.chain(), self]

    def all_tokens(self) -> Tokens:
        return tuple(token for node in self.path() for token in node.tokens)


class Tree:
    """The tree, with its bytes counted. It is not safe for threads by itself."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.root = Node((), [], 0, None, Usage(0.0, 0.0))
        self.nbytes = 0
        self.collisions = 0

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        waiting = list(self.root.children.values())
        while waiting:
            node = waiting.pop()
            yield node
            waiting += node.children.values()

    # -- finding -------------------------------------------------------------------------------------------------------

    def walk(self, tokens: Tokens, hashes: Sequence[str]) -> tuple[list[Node], int]:
        """The nodes whose tokens the sequence begins with, and tokens it shares with the tree in all (whole blocks).

        The last node may be shared in part only. Hashes find the way; tokens decide.
        """
        path: list[Node] = []
        at, node = 0, self.root
        while at // self.block_size < len(hashes):
            child = node.children.get(hashes[at // self.block_size])
            if child is None:
                break
            shared = common(child.tokens, tokens[at : len(hashes) * self.block_size]) // self.block_size
            if shared == 0:
                self.collisions += 1  # another text under the same hash
                break
            path.append(child)
            at += shared * self.block_size
            if at < child.end:
                break
            node = child
        return path, at

    # -- changing ------------------------------------------------------------------------------------------------------

    def node_at(self, tokens: Tokens, hashes: Sequence[str], now: float) -> Node | None:
        """The node that ends where these whole blocks end, made if need be; None if a hash collides."""
        before = self.collisions
        path, shared = self.walk(tokens, hashes)
        if self.collisions > before:
            return None
        parent = path[-1] if path else self.root
        if shared < parent.end:
            parent = self._split(parent, shared, now)
        if shared == len(tokens):
            return parent
        own = list(hashes[shared // self.block_size :])
        return self._add(Node(tokens[shared:], own, shared, parent, Usage(now, now)))

    def _add(self, node: Node) -> Node:
        assert node.parent is not None
        node.parent.children[node.hashes[0]] = node
        self.nbytes += node.nbytes
        return node

    def _split(self, node: Node, at: int, now: float) -> Node:
        """Put a node without a state above `node`, of its tokens up to `at`."""
        assert node.parent is not None
        cut, blocks = at - node.start, (at - node.start) // self.block_size
        upper = Node(node.tokens[:cut], node.hashes[:blocks], node.start, node.parent, Usage(now, now))
        node.parent.children[upper.hashes[0]] = upper
        node.tokens, node.hashes, node.start, node.parent = node.tokens[cut:], node.hashes[blocks:], at, upper
        upper.children[node.hashes[0]] = node
        return upper

    def put(self, node: Node, state: Snapshot, origin: Origin, base: Node | None, croppable: bool) -> None:
        """Give a node without a state one; never another: what continues it relies on its pages."""
        assert node.state is None
        self.nbytes -= node.nbytes
        node.state, node.origin, node.base, node.croppable = state, origin, base, croppable
        self.nbytes += node.nbytes

    def leaves(self) -> list[Node]:
        """Nodes with a state that nothing continues, nobody copies and nobody has pinned."""
        return [node for node in self.nodes() if not (node.children or node.users or node.usage.pins) and node.state]

    def remove(self, node: Node) -> None:
        """Take out a leaf, and what above it is then without purpose."""
        assert not node.children and node.parent is not None
        del node.parent.children[node.hashes[0]]
        self.nbytes -= node.nbytes
        self.tidy(node.parent)

    def tidy(self, node: Node) -> None:
        """Take out a node without a state that leads nowhere; join one that leads to a single node with it."""
        if node.parent is None or node.state is not None or node.users or node.usage.pins:
            return
        if not node.children:
            self.remove(node)
        elif len(node.children) == 1:
            (child,) = node.children.values()
            child.tokens, child.hashes = node.tokens + child.tokens, node.hashes + child.hashes
            child.start, child.parent = node.start, node.parent
            node.parent.children[child.hashes[0]] = child
