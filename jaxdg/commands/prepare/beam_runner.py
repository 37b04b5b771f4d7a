"""Writes shards on Apache Beam, whose workers must reach data and records by the same paths."""

import shlex

from jaxdg.commands.prepare.shards import ShardWriter


def run(writers: list[ShardWriter], options: str) -> None:
    """Writes all shards.

    Args:
        writers: one for each split.
        options: of the pipeline, as on a command line.

    Raises:
        ValueError: Apache Beam is not installed.
    """
    try:
        import apache_beam as beam  # pyright: ignore[reportMissingImports]
        from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
            PipelineOptions,
        )
    except ImportError as error:
        raise ValueError(
            '--beam needs Apache Beam; `pip install "jaxdg[beam]"`, or leave the flag out'
        ) from error
    with beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
        for writer in writers:
            numbers = range(len(writer.bounds) - 1)
            shards = pipeline | f"{writer.split} shards" >> beam.Create(numbers)
            spread = shards | f"{writer.split} spread" >> beam.Reshuffle()
            _ = spread | f"{writer.split} write" >> beam.Map(writer)
