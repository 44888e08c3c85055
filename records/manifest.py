"""A checkpoint's manifest.json: what its files were when written, and whether they still are."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from records.resuming import MANIFEST, checkpoint_step


def damage(path):
    """What is wrong with a checkpoint, in a few words; None where nothing is."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["sha256"]
        if manifest_text(manifest) != text:
            return f"{MANIFEST} was changed"
        if manifest["step"] != checkpoint_step(path):
            return f"it is of step {manifest['step']}"
        found = fingerprints(path / name for name in manifest["files"])
        for name, written in manifest["files"].items():
            if found[name] != written:
                return f"{name} was changed"
    except OSError as error:
        return f"{Path(error.filename or path).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} was changed"
    return None


def manifest_text(manifest):
    """A manifest's file: the same fields give the same bytes, and a checksum of themselves."""
    checksum = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return json.dumps({**manifest, "sha256": checksum}, indent=1, sort_keys=True) + "\n"


def fingerprints(paths):
    """{name: size and SHA-256} of files, side by side: a core hashes a gigabyte in a second."""
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(_fingerprint, paths))


def _fingerprint(path):
    with open(path, "rb") as file:
        checksum = hashlib.file_digest(file, "sha256")
        return path.name, {"size": file.tell(), "sha256": checksum.hexdigest()}
