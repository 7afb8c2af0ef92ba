#!/usr/bin/python3
"""Compares frames and batches that another program encoded with this client's own.

Reads lines of JSON: `{"kind", "fields", "bytes"}` of a frame, with all bytes and those of each field in hexadecimal, or
`{"origin", "sequence", "messages", "bytes"}` of a batch. Prints how many agree.
"""

import json
import sys

from frames import Origin, decode, decode_batch, encode, encode_batch


def main() -> None:
    agreed = 0
    for line in sys.stdin:
        case = json.loads(line)
        data = bytes.fromhex(case["bytes"])
        if "origin" in case:
            messages = [bytes.fromhex(message) for message in case["messages"]]
            assert encode_batch(Origin(**case["origin"]), case["sequence"], messages) == data, case
            assert decode_batch(data).messages == messages, case
        else:
            fields = {name: int.from_bytes(bytes.fromhex(value), "little") for name, value in case["fields"].items()}
            assert encode(case["kind"], **fields) == data, case
            frame = decode(data)
            assert (frame.kind, frame.flags, frame.fields) == (case["kind"], 0, fields), frame
        agreed += 1
    print(agreed)


main()
