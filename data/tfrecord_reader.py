"""Run as a script, in a process of its own: the records of TFRecord files, with the real TensorFlow.

It reads paths from stdin, one a line, and writes each file's records to stdout, each behind its size
(8 bytes, little-endian), then END in a size's place. TensorFlow checks the two checksums of every record.
Exits with 1 and one line on stderr where one fails.
"""

import os
import struct
import sys

END = 2**64 - 1


def main() -> int:
    """Answer until stdin ends; return the exit status."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # its greetings would bury the one line that matters
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # reading files needs no accelerator; the trainer may hold it
    import tensorflow as tf

    out = sys.stdout.buffer
    for line in sys.stdin:
        try:
            for record in tf.data.TFRecordDataset(line.rstrip("\n")).as_numpy_iterator():
                out.write(struct.pack("<Q", len(record)))
                out.write(record)
        except tf.errors.OpError as error:
            print((error.message or type(error).__name__).splitlines()[0], file=sys.stderr)
            return 1
        out.write(struct.pack("<Q", END))
        out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
