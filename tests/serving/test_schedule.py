"""Nobody waits for ever, and nobody who writes waits long."""

import numpy as np

from serving.schedule import Turns

CHUNK = 8


def play(slots, every, rng, steps=400):
    """What was done at each step, and who was seated when; prompts and answers of random lengths."""
    schedule, turns, seated, left = Turns(slots, CHUNK, every), [], [], {}
    added = []
    for step in range(steps):
        while rng.random() < 0.4:
            name, client = len(added), str(int(rng.integers(3)))
            left[name] = int(rng.integers(1, 9))
            added.append((name, client, step))
            schedule.add(name, client)
        seated += [(seat.item, step) for seat in schedule.admit(lambda item: (0, item * 7 % 40))]
        turn = schedule.turn()
        turns.append(turn)
        if turn == "prefill":
            seat, begin, end = schedule.read()
            assert begin % CHUNK == 0 and 0 < end - begin <= CHUNK
        elif turn == "decode":
            for seat in list(schedule.writing.values()):
                left[seat.item] -= 1
                if left[seat.item] == 0:
                    schedule.leave(seat)
        assert len({seat.slot for seat in schedule.seats}) == sum(1 for _ in schedule.seats) <= slots
        assert (turn is None) == (not any(True for _ in schedule.seats))
    return turns, added, seated, schedule


def test_two_chunks_never_stand_together_while_somebody_writes():
    schedule = Turns(3, CHUNK)
    for name, size in enumerate((0, 100, 100)):
        schedule.add((name, size), "")
    schedule.admit(lambda item: (0, item[1]))
    turns = []
    for _ in range(12):
        turns.append(schedule.turn())
        if turns[-1] == "prefill":
            schedule.read()
    assert turns == ["decode", "prefill"] * 6


def test_clients_take_turns_and_each_one_s_requests_their_order():
    schedule = Turns(1, CHUNK)
    for name in range(10):
        schedule.add(("greedy", name), "greedy")
    schedule.add(("modest", 0), "modest")
    order = []
    for _ in range(11):
        (seat,) = schedule.admit(lambda item: (0, 0))
        order.append(seat.item)
        schedule.leave(seat)
    assert order.index(("modest", 0)) == 1
    assert [name for client, name in order if client == "greedy"] == list(range(10))


def test_everybody_gets_a_slot():
    _, added, seated, schedule = play(4, 1, np.random.default_rng(0))
    waiting = set(schedule.waiting)
    assert {name for name, _ in seated} | waiting == {name for name, *_ in added}
    order = {}
    clients = {name: client for name, client, _ in added}
    for name, _ in seated:
        assert order.get(clients[name], -1) < name  # of one client, in order
        order[clients[name]] = name


def test_one_without_room_is_not_overtaken():
    schedule = Turns(2, CHUNK)
    for name in ("long", "short"):
        schedule.add(name, name)
    assert schedule.admit(lambda item: None if item == "long" else (0, 0)) == []
    schedule.drop("long", "long")
    assert [seat.item for seat in schedule.admit(lambda item: (0, 0))] == ["short"]
