"""Size and speed of a volume in other codecs than the shards', on the two real CTs.

    python docs/lab-notes/volume_codecs.py FOLDER

FOLDER receives the CTs on thin slices, from which the pipeline makes volumes of 64 × 512 × 512.
"""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

import blosc2
import numpy as np

from benchmarks.preprocess import GRID, SPACING, load_ct, make_volumes, name_case
from data_pipeline.cases import case_to_sample

BLOCK_BYTES, ROUNDS = 1 << 18, 7
CODECS = (
    ("zstd 1, bits (the shards')", blosc2.Codec.ZSTD, 1, blosc2.Filter.BITSHUFFLE),
    ("zstd 1, bytes", blosc2.Codec.ZSTD, 1, blosc2.Filter.SHUFFLE),
    ("LZ4 1, bits", blosc2.Codec.LZ4, 1, blosc2.Filter.BITSHUFFLE),
    ("LZ4 9, bits", blosc2.Codec.LZ4, 9, blosc2.Filter.BITSHUFFLE),
    ("BloscLZ 5, bits", blosc2.Codec.BLOSCLZ, 5, blosc2.Filter.BITSHUFFLE),
)

for path in make_volumes(Path(sys.argv[1]), count=2, slices=100):
    sample = case_to_sample(name_case(path, "patient", partial(load_ct, path)), GRID, SPACING)
    volume = np.ascontiguousarray(sample.ct)
    decoded = np.empty_like(volume)
    for name, codec, level, shuffle in CODECS:
        encode_seconds, decode_seconds = [], []
        for _ in range(ROUNDS):
            start_seconds = time.process_time()
            packed = blosc2.compress2(
                volume,
                codec=codec,
                clevel=level,
                typesize=volume.itemsize,
                filters=[shuffle],
                filters_meta=[0],
                blocksize=BLOCK_BYTES,
                nthreads=1,
            )
            encode_seconds.append(time.process_time() - start_seconds)
            start_seconds = time.process_time()
            blosc2.decompress2(packed, dst=decoded, nthreads=1)
            decode_seconds.append(time.process_time() - start_seconds)
        assert np.array_equal(volume, decoded)
        sys.stdout.write(
            f"{path.name} {name:27} {len(packed) / 1e6:6.2f} MB, CPU s: "
            f"encode {statistics.median(encode_seconds):.3f}, "
            f"decode {statistics.median(decode_seconds):.3f}\n"
        )
