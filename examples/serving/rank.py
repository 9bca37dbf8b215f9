"""Rank candidates for a user by a running service, with nothing but Python's own library.

    bahe serve &
    python examples/serving/rank.py http://127.0.0.1:8000 405 50 181 258

An API key is taken from BAHE_API_KEY. A service that has too much to do says when to try again; one try is
made then, and after it the candidates stay in the order that they came in: a page is better unranked than
late.
"""

from __future__ import annotations

import json
import os
import sys
import time
import urllib.error
import urllib.request

SECONDS = 2.0
"""How long a page waits for its ranking."""


def probabilities(service: str, user_id: str, item_ids: list[str]) -> dict[str, float]:
    """Click probabilities of those items that the service knows."""
    request = urllib.request.Request(
        f"{service}/v1/score",
        json.dumps({"user_id": user_id, "item_ids": item_ids}).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('BAHE_API_KEY', '')}",
        },
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        scored = json.load(answer)["items"]
    return {str(one["item_id"]): one["probability"] for one in scored if one["status"] == "ok"}


def ranked(service: str, user_id: str, item_ids: list[str]) -> list[str]:
    """The items, best first; unknown ones last, and all as they came when the service does not answer."""
    for attempt in (1, 2):
        try:
            known = probabilities(service, user_id, item_ids)
            return sorted(item_ids, key=lambda item: -known.get(item, -1.0))
        except urllib.error.HTTPError as error:
            with error:
                if error.code != 503 or attempt == 2:
                    print(f"unranked: {json.load(error)['detail']}", file=sys.stderr)
                    break
                time.sleep(min(SECONDS, float(error.headers.get("Retry-After", SECONDS))))
        except OSError as error:
            print(f"unranked: {error}", file=sys.stderr)
            break
    return item_ids


if __name__ == "__main__":
    service, user_id, *item_ids = sys.argv[1:]
    print(*ranked(service, user_id, item_ids))
