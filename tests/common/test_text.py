from common.text import aligned, counted, duration, first_line, human, reason


def test_counts_and_durations_read_well():
    assert [human(x) for x in (0, 7, 950, 12345, 999_600, 4.56e6, 7e9, 2e12)] == [
        *("0", "7", "950", "12.3k", "1M", "4.56M", "7B", "2T")
    ]
    assert [duration(x) for x in (-1, 7.4, 754, 3723, 2 * 86400 + 3 * 3600 + 240)] == [
        *("0:00", "0:07", "12:34", "1:02:03", "2d 03:04")
    ]


def test_a_noun_has_an_s_unless_it_is_one():
    assert [counted(n, "device") for n in (0, 1, 2, 4096)] == [
        "0 devices",
        "1 device",
        "2 devices",
        "4,096 devices",
    ]


def test_columns_stand_below_each_other_at_their_left_or_right_edge():
    rows = [("step", "count", "why"), ("a longer one", "7", ""), ("b", "12,000", "x")]
    assert aligned(rows, right={1}) == [
        "step           count  why",
        "a longer one       7",
        "b             12,000  x",
    ]
    assert aligned([("a", "b")]) == ["a  b"]


def test_an_error_is_one_line_also_where_it_says_nothing():
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(first_line(OSError("x" * 999))) == 200
    assert reason(ValueError("one\ntwo")) == "ValueError: one"
