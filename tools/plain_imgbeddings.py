"""The tutorial's own way, for comparison: `imgbeddings()` for each file, two requests for each document.

    python -m tools.plain_imgbeddings create FOLDER MODEL
    python -m tools.plain_imgbeddings search IMAGE MODEL

With ES_URL, the index is `plain` on Elasticsearch; without it, create keeps nothing and search only embeds. Model and
processor, with the tokenizer that `imgbeddings()` also loads each time, have CLIP's size and random weights
(tools/clip_model.py).
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from elasticsearch import Elasticsearch

from imagesearch.index.connection import Connection
from imagesearch.models.clip import import_imgbeddings

INDEX = "plain"


def load(model: str) -> Any:
    """`imgbeddings()`: a new session, a new processor."""
    from transformers import CLIPProcessor

    theirs = import_imgbeddings()
    instance = object.__new__(theirs)
    instance.pca = None
    instance.session = sys.modules[theirs.__module__].create_session_for_provider(model, None, False)
    instance.processor = CLIPProcessor.from_pretrained(Path(model).parent / "processor")
    instance.processor.image_processor.do_center_crop = False
    return instance


def embed(path: str, model: str) -> list[float]:
    vector: list[float] = load(model).to_embeddings(path)[0].tolist()
    return vector


def connect() -> Elasticsearch | None:
    connection = Connection.from_env(os.environ)
    if connection is None:
        return None
    return Elasticsearch(connection.url, headers=connection.headers, ssl_context=connection.ssl_context())


def create(folder: str, model: str) -> None:
    client = connect()
    if client and not client.indices.exists(index=INDEX):
        vector = {"type": "dense_vector", "dims": 768, "index": True, "similarity": "cosine"}
        client.indices.create(index=INDEX, mappings={"properties": {"embeddings": vector}})
    for path in sorted(Path(folder).rglob("*.jpg")):
        document = {"embeddings": embed(str(path), model), "desc": path.parent.name, "file_path": str(path)}
        name = hashlib.sha256(str(path).encode()).hexdigest()
        if client and not client.exists(index=INDEX, id=name):
            client.create(index=INDEX, id=name, document=document)


def search(image: str, model: str) -> None:
    knn = {"field": "embeddings", "query_vector": embed(image, model), "k": 1, "num_candidates": 100}
    if client := connect():
        response = client.search(index=INDEX, knn=knn, fields=[{"field": "file_path"}, {"field": "desc"}], source=False)
        print(json.dumps(response.body))


if __name__ == "__main__":
    {"create": create, "search": search}[sys.argv[1]](*sys.argv[2:])
