"""Run as a script, in a process of its own: the records of TFRecord files, with the real TensorFlow.

It reads paths from stdin, a JSON string a line, and writes each file's records to stdout, each behind its
size (8 bytes, little-endian), then END in a size's place. TensorFlow checks both checksums of every record;
where one fails, BROKEN stands in END's place, and what TensorFlow says of it follows as a record.
"""

import json
import os
import struct
import sys

END, BROKEN = 2**64 - 1, 2**64 - 2


def main() -> None:
    """Answer until stdin ends."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its greetings would bury the one line that matters
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # reading files needs no accelerator; the trainer may hold it
    import tensorflow as tf

    out = sys.stdout.buffer
    for line in sys.stdin:
        try:
            for record in tf.data.TFRecordDataset(json.loads(line)).as_numpy_iterator():
                out.write(struct.pack("<Q", len(record)))
                out.write(record)
            out.write(struct.pack("<Q", END))
        except tf.errors.OpError as error:
            said = (error.message or type(error).__name__).encode()
            out.write(struct.pack("<QQ", BROKEN, len(said)) + said)
        out.flush()


if __name__ == "__main__":
    main()
