"""Examines OUT and decides what a call has to do there, without changing anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dupr_cli.addresses import public_address
from dupr_cli.artifacts.remote import is_remote
from dupr_cli.artifacts.shards import MANIFEST, UNFINISHED, Manifest
from dupr_cli.errors import UsageError
from dupr_cli.prepare.assembly import digests_in
from dupr_cli.prepare.blocks import Work
from dupr_cli.prepare.excluded_sets import ExcludedSets, describe_sets
from dupr_cli.prepare.listing import split_entries, survey
from dupr_cli.prepare.source_record import SOURCE, KnownSource, SourceChanges, SourceDigest
from dupr_cli.prepare.sources import ImageSource
from dupr_cli.prepare.unfinished import State
from dupr_cli.recipe import PrepareRecipe, recipe_keys
from dupr_cli.runtime.output import differences, holds_anything

Action = Literal["begin", "continue", "append", "replace", "nothing"]


@dataclass(frozen=True)
class Standing:
    """What a call has to do. clears: unfinished work is in the way and must be removed.

    to_read: images by split, if they are known without listing the source again.
    """

    action: Action
    clears: bool = False
    to_read: dict[str, int] | None = None
    changes: SourceChanges = field(default_factory=SourceChanges)
    warning: str = ""


def require_other_folder(work: Work) -> None:
    """Raises UsageError when the shards would be written into the source itself."""
    if not is_remote(work.address) and Path(work.out).resolve() == Path(work.address).resolve():
        raise UsageError(f"{work.out}: the output is the source itself; give another folder.")


def look(
    work: Work,
    source: ImageSource,
    excluded: ExcludedSets,
    *,
    overwrite: bool,
    append: bool,
    is_task: bool = False,
) -> Standing:
    """Examine the output folder and decide what to do.

    excluded: hashed only if they must be compared with those of an earlier call. Raises
    UsageError when the folder holds something else, unless it may be overwritten, or when the
    source or the excluded images are not those of the earlier call.
    """
    out = Path(work.out)
    require_other_folder(work)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, but the output must be a folder.")
    state, finished = State.read(work.folder), (out / MANIFEST).is_file()
    if not finished and state is None:
        if holds_anything(out, besides=[UNFINISHED]):
            raise UsageError(
                f"{out}: the folder is not empty and holds no shards of dupr. Give another OUT."
            )
        return Standing("begin")
    if is_task and state is not None and not _other_recipe(state.recipe, state.source, work):
        # The first task has listed the source, and hashed the excluded images, for all tasks.
        return Standing("continue")
    digest = survey(source, work.recipe)
    if state is not None and not finished:
        return _for_unfinished(work, state, digest, excluded, overwrite)
    manifest = _read_manifest(out, overwrite)
    if manifest is None:
        return Standing("replace", clears=state is not None)
    known_digest, known_excluded = digests_in(manifest.fingerprint)
    other = _other_recipe(manifest.recipe, manifest.source, work)
    other = other or _other_images(known_excluded, excluded)
    old = not (out / SOURCE).is_file()  # written by a dupr that recorded only names
    recorded = (digest.names_alone,) if old else (str(digest), digest.whole)
    same_source = known_digest in recorded
    if not other and same_source:
        rest = state is not None and not _other_recipe(state.recipe, state.source, work)
        return _for_same_set(work, manifest, rest, overwrite)
    if state is not None:
        found = _for_unfinished(work, state, digest, excluded, overwrite)
        if found.action == "continue" and not state.appends and not overwrite:
            raise UsageError(
                f"{out}: the folder holds finished shards, and unfinished ones that would replace "
                f"them. Give --overwrite again to finish them."
            )
        return found
    if overwrite:
        return Standing("replace")
    if other or old:
        raise UsageError(
            f"{out} holds shards of another recipe or source:\n"
            + "\n".join(other.values() or ["  the names of the images differ"])
            + "\nGive another OUT, or --overwrite to replace them."
        )
    return _for_changed_source(work, source, append)


def _for_unfinished(
    work: Work, state: State, digest: SourceDigest, excluded: ExcludedSets, overwrite: bool
) -> Standing:
    other = _other_recipe(state.recipe, state.source, work)
    other = other or _other_images(state.excluded, excluded)
    if not other and state.digest in (str(digest), digest.whole, digest.names_alone):
        return Standing("continue")
    if overwrite:
        return Standing("replace", clears=True)
    raise UsageError(
        f"{work.out} holds unfinished shards of another source or recipe:\n"
        + "\n".join(other.values() or ["  images of the source are new, changed or gone"])
        + "\nTo finish them, give the earlier command again with the source as it was; to replace "
        "them, add --overwrite."
    )


def _for_same_set(work: Work, manifest: Manifest, rest: bool, overwrite: bool) -> Standing:
    """rest: an interruption of the last two steps left unfinished work of the same set."""
    wrong = _damaged(Path(work.out), manifest)
    if wrong is None:
        return Standing("nothing", clears=rest)
    if overwrite:
        return Standing("replace", clears=rest)
    raise UsageError(
        f"{wrong} is missing or has the wrong size, although the set is complete. Put it back, or "
        f"make the set again with --overwrite."
    )


def _for_changed_source(work: Work, source: ImageSource, append: bool) -> Standing:
    """For a complete set of this recipe whose source now has other images."""
    new: dict[str, int] = {}
    known, changes = KnownSource(Path(work.out) / SOURCE), SourceChanges()
    for entry in split_entries(source, work.recipe):
        kind = known.kind(entry)
        if kind == "new":
            new[entry.split] = new.get(entry.split, 0) + 1
        if kind is not None:
            changes.add(kind, entry.name)
    known.add_missing(changes)
    if not any(changes.counts.values()):
        return Standing("nothing")  # images that had been missing are back
    changed, count = changes.counts["changed"], changes.counts["new"]
    if changed or not append:
        way = "--overwrite to make all shards again"
        if not changed:
            way = "--append to add shards of the new images, " * (count > 0) + way
        raise UsageError(
            f"{work.out}: the source has changed since its shards were made; of its images, "
            f"{changes.describe()}. Give another OUT, {way}."
        )
    warning = ""
    if changes.counts["missing"]:
        gone = changes.describe("missing")
        warning = f"{work.source}: {gone} since the shards were made; they stay in the shards"
    return Standing("append" if count else "nothing", False, new, changes, warning)


def _other_recipe(recipe: dict[str, Any], source: str, work: Work) -> dict[str, str]:
    """What differs from the recipe and the source's address, as one line of text per key."""
    now = work.recipe.model_dump(mode="json")
    try:
        # Validation fills in the defaults of keys that an older dupr did not have.
        before = PrepareRecipe.model_validate(recipe).model_dump(mode="json")
    except ValueError:  # written by a later dupr with other keys: the differences name them
        before = recipe
    keys = [
        recipe_keys({k: v for k, v in r.items() if k not in ("description", "exclude")})
        for r in (before, now)
    ]
    sources = ({"SOURCE": public_address(source)}, {"SOURCE": work.source})
    found = differences({**keys[0], **sources[0]}, {**keys[1], **sources[1]})
    excluded = {public_address(a): splits for a, splits in before.get("exclude", {}).items()}
    if excluded != now["exclude"]:
        sets = describe_sets(excluded), describe_sets(now["exclude"])
        found["exclude"] = f"exclude: {sets[0]} there, {sets[1]} now"
    return {key: f"  {line}" for key, line in found.items()}


def _other_images(known: str, excluded: ExcludedSets) -> dict[str, str]:
    """Like `_other_recipe`, for the images of the excluded sets. known: their earlier digest."""
    if known == excluded.digest:
        return {}
    sets = describe_sets(excluded.sets)
    return {"exclude": f"  exclude: images of {sets} are new, changed or gone"}


def _read_manifest(out: Path, overwrite: bool) -> Manifest | None:
    """The manifest, or None if it is damaged and may be replaced."""
    try:
        return Manifest.read(out)
    except UsageError:
        if overwrite:
            return None
        raise


def _damaged(out: Path, manifest: Manifest) -> Path | None:
    """The first shard whose length differs from the manifest."""
    for entries in manifest.splits.values():
        for entry in entries:
            tar = out / entry.file
            if not tar.is_file() or tar.stat().st_size != entry.bytes:
                return tar
    return None
