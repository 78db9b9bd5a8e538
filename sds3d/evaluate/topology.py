"""Components and handles of a mesh.

A component is a piece whose faces are connected by edges, and which has at least ``CRUMB`` of the mesh's area. (A ball
that is smaller than this beside another one has less than 1/30 of its diameter.) A cavity is a component, too. The
genus is the number of handles of all components together,

    sum over the components of 1 - (V - E + F) / 2

It is known for closed meshes only: every edge has exactly two faces, which face the same side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import trimesh

CRUMB = 0.001  # least fraction of a mesh's area that a component has
SAME = 6  # decimals; vertices that agree in them are at one place


def topology(mesh: trimesh.Trimesh) -> tuple[int, int | None]:
    """Return the number of components of a mesh, and its genus, or None if the mesh is not closed.

    If the mesh is not closed, vertices at one place become one before it is looked at, since files have several
    vertices at a seam.
    """
    vertices, faces = np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces)
    if not _closed(faces):
        vertices, index = np.unique(vertices.round(SAME), axis=0, return_inverse=True)
        faces = index.reshape(-1)[faces]
        faces = faces[(faces != np.roll(faces, 1, axis=1)).all(1)]  # the others are edges now
    labels, euler = _pieces(faces)
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    areas = np.bincount(labels, np.linalg.norm(np.cross(b - a, c - a), axis=1))
    kept = areas >= CRUMB * areas.sum()
    return int(kept.sum()), int(kept.sum() - euler[kept].sum() // 2) if _closed(faces) else None


def _half_edges(faces: np.ndarray) -> np.ndarray:
    """The directed edges (3 F, 2) of faces (F, 3); edge k F + i goes from corner k of face i to the next one."""
    return np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])


def _closed(faces: np.ndarray) -> bool:
    """Whether every edge has exactly two faces, which go through it in opposite directions."""
    edges = _half_edges(faces)
    there, back = np.unique(edges, axis=0), np.unique(edges[:, ::-1], axis=0)
    return len(there) == len(edges) and np.array_equal(there, back)


def _pieces(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the piece of each face (F,), and the Euler characteristic V - E + F of each piece (P,).

    Pieces are connected by edges. A vertex at which a piece only touches itself, or another one, counts once for
    each fan of faces around it, so that pieces that touch there are as if they stood apart.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def connect(pairs: list[tuple[np.ndarray, np.ndarray]], count: int) -> np.ndarray:
        a, b = (np.concatenate(ends) for ends in zip(*pairs))
        return connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(count, count)), directed=False)[1]

    count = len(faces)
    edges = _half_edges(faces)
    undirected = np.sort(edges, axis=1)
    order = np.lexsort(undirected.T)
    same = (undirected[order][1:] == undirected[order][:-1]).all(1)
    one, other = order[:-1][same], order[1:][same]  # half-edges on the same edge
    labels = connect([(one % count, other % count)], count)
    corners = np.arange(3 * count).reshape(3, count)  # corner k of face i is k F + i, as its half-edge
    following = np.roll(corners, -1, axis=0).reshape(-1)
    turned = edges[one, 0] == edges[other, 1]  # the usual case, opposite directions
    meets = np.where(turned, following[other], other), np.where(turned, other, following[other])
    fans = connect([(one, meets[0]), (following[one], meets[1])], 3 * count)
    pieces = int(labels.max()) + 1
    vertex_piece = np.zeros(fans.max() + 1, dtype=np.int64)
    vertex_piece[fans] = np.tile(labels, 3)
    distinct = np.ones(len(order), dtype=bool)
    distinct[1:] = ~same
    edge_piece = labels[order[distinct] % count]
    counts = [np.bincount(of, minlength=pieces) for of in (vertex_piece, edge_piece, labels)]
    return labels, counts[0] - counts[1] + counts[2]
