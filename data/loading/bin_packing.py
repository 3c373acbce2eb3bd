"""Pieces into rows of a fixed length: bin packing, in Python, at about a million pieces a second.

Each function takes lengths [P], 1 <= length <= room, and returns each piece's row [P], rows numbered from 0.
"""

import numpy as np
from jaxtyping import Int


def best_fit(lengths: Int[np.ndarray, " P"], room: int) -> Int[np.ndarray, " P"]:
    """Best-fit decreasing: each piece, longest first, into the fullest row that still takes it.

    Of rows with the same room, the one that came to it last. Pieces of one length are placed together: a row
    that is the best fit for one of them stays the best for the next until it takes no more, so whole stacks
    of rows with the same room are filled at once, whatever the number of pieces.
    """
    order = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(lengths, return_counts=True)
    with_room: list[list[int]] = [[] for _ in range(room + 1)]
    rooms = 0  # bit r is set where with_room[r] is not empty: the best fit is a lowest set bit
    rows: list[int] = []  # of the pieces in `order`
    num_rows = 0
    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            fitting = rooms >> length
            if fitting:
                space = (fitting & -fitting).bit_length() - 1 + length
                stack = with_room[space]
                each = space // length
                wanted = 1 + (left - 1) // each
                chosen = stack[: -wanted - 1 : -1]  # the last ones, last first
                del stack[len(stack) - len(chosen) :]
                if not stack:
                    rooms ^= 1 << space
            else:
                space, each = room, room // length
                chosen = list(range(num_rows, num_rows + 1 + (left - 1) // each))
                num_rows += len(chosen)
            placed = min(left, each * len(chosen))
            rows += chosen[:placed] if each == 1 else np.repeat(chosen, each)[:placed].tolist()
            left -= placed
            last = space - length * (placed - each * (len(chosen) - 1))  # room left in the last of them
            for rest, some in ((space - length * each, chosen[:-1]), (last, chosen[-1:])):
                if rest and some:
                    with_room[rest] += some
                    rooms |= 1 << rest
    result = np.empty(len(lengths), np.int64)
    result[order] = rows
    return result


def first_fit(lengths: Int[np.ndarray, " P"], room: int) -> Int[np.ndarray, " P"]:
    """First-fit: each piece, in the order given, into the first row that takes it.

    `most` is a binary tree over rows, each node holding the most room below it, so that a row is found and
    changed in a logarithm of their number (Johnson, 1973). Any two rows in turn are more than full together,
    which bounds that number.
    """
    bound = min(len(lengths), 2 * -(-int(lengths.sum()) // room) + 1)
    size = 1 << (bound - 1).bit_length()
    most = [room] * (2 * size)
    result = []
    for length in lengths.tolist():
        node = 1
        while node < size:
            node *= 2
            if most[node] < length:
                node += 1
        result.append(node - size)
        left = most[node] - length
        most[node] = left
        while node > 1:
            other = most[node ^ 1]
            if other > left:
                left = other
            node >>= 1
            if most[node] == left:
                break
            most[node] = left
    return np.array(result, np.int64)
