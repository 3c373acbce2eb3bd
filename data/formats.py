"""Words of `data.format`: how records look, which rows belong together, and marks of an answer's tokens."""

WANTED, UNWANTED, MISMATCHED = 1, 2, 3  # marks of an answer's tokens; the last is of another prompt
# Rows that belong together, one behind the other: (better, worse), or (answer, another's answer).
GROUPS = {"pairs": 2, "labels": 2}
FORMS = {
    "chat": '{"messages": [{"role": ..., "content": ...}, ...]} or ShareGPT\'s form',
    "completion": '{"prompt": ..., "completion": ...}',
    "pairs": '{"prompt": ..., "chosen": ..., "rejected": ...}',
    "labels": '{"prompt": ..., "completion": ..., "label": true | false}',
}
