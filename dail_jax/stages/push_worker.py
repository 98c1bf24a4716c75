"""The process that uploads a folder to a hub; started by `export`, with its arguments as JSON in `argv[1]`.

It is a process of its own because the client reads from the environment, once, whether it may use the network: all others
may not. The answer on stdout is `{"url": ...}` or `{"fault": ...}`.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def push(folder: str, repository: str, private: bool) -> dict[str, Any]:
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        return {"fault": "there is no token: `hf auth login`, or HF_TOKEN in the environment"}
    api = huggingface_hub.HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by dail_jax")
    return {"url": str(done.repo_url)}


def main() -> None:
    try:
        result = push(**json.loads(sys.argv[1]))
    except Exception as error:  # whatever the network, the hub or the client raises
        lines = [line for line in str(error).splitlines() if line.strip()]
        result = {"fault": f"{type(error).__name__}: {lines[0].strip() if lines else 'no message'}"}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
