"""Read the tables of jobs over images and videos with DuckDB and pandas, and compare every value.

`make parity` runs this file as a module, with the Python of an environment that has DuckDB.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import chunkq
from tests.harness.photos import photo_job, write_photos
from tests.harness.videos import write_video
from tests.integration.test_video_jobs import video_job

QUERIES = {
    "rows": "SELECT path, prediction, label, score, top_labels, top_scores, logits, truth, correct "
    "FROM '{photos}' ORDER BY path",
    "classes": "SELECT label, count(*) AS images, avg(correct::INT) AS accuracy FROM '{photos}' "
    "GROUP BY label ORDER BY label",
    "csv": "SELECT path, label, top_labels::VARCHAR[] AS top_labels "
    "FROM read_csv('{csv}') ORDER BY path",
    "jsonl": "SELECT path, label, top_labels FROM read_json('{jsonl}') ORDER BY path",
    "keypoints": "SELECT path, frame, k.name AS name, k.x AS x, k.y AS y, k.score AS score FROM "
    "(SELECT path, frame, unnest(flatten(keypoints)) AS k FROM '{keypoints}') ORDER BY path, frame",
    "errors": "SELECT path, row, stage, code, message FROM '{errors}' ORDER BY row",
}
READ = """
import json, sys, duckdb
for query in sys.argv[1:]:
    found = duckdb.sql(query)
    print(json.dumps([dict(zip(found.columns, row)) for row in found.fetchall()]))
"""


def write_tables(folder: Path) -> dict[str, Path]:
    """Run jobs; return the path of each table."""
    write_photos(folder)
    photos = {name: folder / f"photos.{name}" for name in ("parquet", "csv", "jsonl")}
    for path in photos.values():
        values = photo_job(folder, output=str(path), keep="logits")
        report = chunkq.run(values, executor="inprocess")
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "a.mp4", 20, bf="2", g="7")
    keypoints = folder / "keypoints.parquet"
    chunkq.run(video_job(folder / "videos", folder, output=str(keypoints)), executor="inprocess")
    return {
        "photos": photos["parquet"],
        "csv": photos["csv"],
        "jsonl": photos["jsonl"],
        "keypoints": keypoints,
        "errors": Path(report["images"]["errors"]),
    }


def expected(tables: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Return what each query has to find, from pyarrow."""
    rows = sorted(pq.read_table(tables["photos"]).to_pylist(), key=lambda row: row["path"])
    classes = []
    for label in sorted({row["label"] for row in rows}):
        correct = [row["correct"] for row in rows if row["label"] == label]
        accuracy = sum(correct) / len(correct)
        classes.append({"label": label, "images": len(correct), "accuracy": accuracy})
    keypoints = [
        {"path": row["path"], "frame": row["frame"], **keypoint}
        for row in pq.read_table(tables["keypoints"]).to_pylist()
        for animal in row["keypoints"]
        for keypoint in animal
    ]
    some = [{key: row[key] for key in ("path", "label", "top_labels")} for row in rows]
    return {
        "rows": rows,
        "classes": classes,
        "csv": some,
        "jsonl": some,
        "keypoints": keypoints,
        "errors": pq.read_table(tables["errors"]).to_pylist(),
    }


def main(python: str) -> None:
    """Compare every query, and the tables as pandas reads them. Raises AssertionError."""
    import pandas as pd

    with tempfile.TemporaryDirectory() as name:
        tables = write_tables(Path(name))
        wanted = expected(tables)
        texts = {key: query.format(**tables) for key, query in QUERIES.items()}
        command = [python, "-c", READ, *texts.values()]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for key, line in zip(texts, done.stdout.splitlines(), strict=True):
            assert json.loads(line) == wanted[key], f"{key}: {line}, expected {wanted[key]}"
            print(f"DuckDB, {key}: {len(wanted[key])} rows as written")  # noqa: T201
        frames = (
            pd.read_parquet(tables["photos"]),
            pd.read_csv(tables["csv"], converters=dict.fromkeys(("top_labels",), json.loads)),
            pd.read_json(tables["jsonl"], lines=True),
        )
        for frame in frames:
            for column in ("path", "prediction", "label", "top_labels", "correct"):
                found = [list(v) if column == "top_labels" else v for v in frame[column]]
                assert found == [row[column] for row in wanted["rows"]], column
        print(f"pandas: {len(wanted['rows'])} rows of .parquet, .csv and .jsonl")  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1])
