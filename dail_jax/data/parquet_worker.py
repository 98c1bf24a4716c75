r"""The process that reads a parquet file, started by `records`.

A damaged file can crash the C++ reader, and a small one can expand to any size, so the file is read in a process with
limits on memory and CPU time, which writes the wanted columns to stdout as JSON lines. Arguments: the path, the most
bytes to write, the most rows to write (0: all), the columns. Exit status 3 means that the file is at fault; the reason
follows the last \x1e on stderr.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import NoReturn

MEMORY = 8 << 30  # bytes of address space
SECONDS = 300  # of CPU time


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    import pyarrow

    pyarrow.set_cpu_count(1)
    try:
        convert(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    except MemoryError:
        fail(f"got a table that does not fit into {MEMORY >> 30} GiB of memory")
    except Exception as error:
        fail(f"got a damaged parquet file: {error or type(error).__name__}")


def convert(path: str, cap: int, limit: int, columns: list[str]) -> None:
    """Writes rows to stdout. Columns that are not wanted are written as null, so that errors can name them."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path, memory_map=False, page_checksum_verification=True)
    names = file.schema_arrow.names
    if len(set(names)) != len(names):
        fail("got two columns with the same name, want distinct names")
    size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups))
    if size > cap:
        fail(f"got a table of {size >> 20} MiB, want at most {cap >> 20} MiB")
    wanted = [name for name in columns if name in names]
    others = {name: None for name in names if name not in wanted}
    written = rows = 0
    for batch in file.iter_batches(batch_size=16, columns=wanted, use_threads=False):
        batch.validate(full=True)
        if batch.nbytes > cap:
            fail(f"got rows that expand to more than {cap >> 20} MiB")
        for row in batch.to_pylist():
            line = json.dumps({**others, **row}, default=lambda value: [type(value).__name__])
            written += len(line)
            if written > cap:
                fail(f"got rows that expand to more than {cap >> 20} MiB")
            sys.stdout.write(line + "\n")
            rows += 1
            if rows == limit:
                return
    if rows != file.metadata.num_rows:
        fail(f"got {rows} rows, want the {file.metadata.num_rows} that its footer promises")


def fail(message: str) -> NoReturn:
    """Reports what is wrong with the file, and exits."""
    sys.stderr.write("\x1e" + message)
    sys.stderr.flush()
    sys.exit(3)


if __name__ == "__main__":
    main()
