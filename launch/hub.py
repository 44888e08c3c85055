"""Small files from the Hugging Face hub, or one line that says why there are none."""

import threading

from utils import UserError, hub_token

HUB_SECONDS = 3  # how long to wait for the hub before saying that it cannot be reached


def hub_file(repo_id, filename, repo_type, flag, needed=True):
    """Fetch a small file from the Hugging Face hub, or find it in the local cache. None where the
    repository is there, has no such file, and it is not `needed`.

    It runs in a thread, because a name server that never answers heeds no time-out. Raises
    UserError, naming `flag`, within HUB_SECONDS.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    found = {}

    def fetch():
        try:
            # Asked first because it gives up at once, where the download would retry for long.
            huggingface_hub.HfApi().repo_info(
                repo_id, repo_type=repo_type, timeout=HUB_SECONDS - 1, token=hub_token()
            )
            found["path"] = huggingface_hub.hf_hub_download(
                repo_id, filename, repo_type=repo_type, token=hub_token()
            )
        except Exception as error:  # whatever it is, it is judged below, in the main thread
            found["error"] = error

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    if "path" in found:
        return found["path"]
    error = found.get("error")
    if isinstance(error, errors.HFValidationError):
        raise UserError(f"{flag}: neither a directory nor a name that the hub allows")
    if isinstance(error, errors.GatedRepoError):
        raise UserError(f"{flag}: access is gated; accept its licence on the hub and set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        raise UserError(f"{flag}: not on the Hugging Face hub (a private one needs HF_TOKEN)")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        raise UserError(f"{flag}: the hub refuses the access token; check HF_TOKEN")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(
        error, errors.LocalEntryNotFoundError
    ):
        if not needed:
            return None
        raise UserError(f"{flag}: has no {filename} on the hub")
    cached = huggingface_hub.try_to_load_from_cache(repo_id, filename, repo_type=repo_type)
    if isinstance(cached, str):
        constants.HF_HUB_OFFLINE = True  # or every later look-up would wait for the hub again
        return cached
    raise UserError(
        f"{flag}: cannot reach the Hugging Face hub. Without it: `make demo`, or --model_name PATH "
        "and --dataset_path PATH"
    )
