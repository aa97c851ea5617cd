"""Images of the subject's class, made by the base pipeline where there are too few."""

from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from randlora_vision.files import replacing
from randlora_vision.training.diffusion_samples import Sampler, as_image
from randlora_vision.training.dreambooth_options import SubjectOptions
from randlora_vision.training.dreambooth_subject import list_images


def class_images(options: SubjectOptions, folder: Path, sampler: Sampler, accelerator: Accelerator) -> list[Path]:
    """Return the first `num_class_images` images of the folder, filled up first by all processes together.

    An image's name tells its number, and the number its seed: what was interrupted goes on where it was.
    """
    if not options.with_prior_preservation:
        return []
    assert options.class_prompt is not None
    folder.mkdir(parents=True, exist_ok=True)
    missing = options.num_class_images - len(list_images(folder, "--class-data-dir"))
    names = ((number, folder / f"made-{number:05}.png") for number in range(options.num_class_images))
    accelerator.wait_for_everyone()  # before the folder changes
    wanted = [(number, path) for number, path in names if not path.exists()][: max(0, missing)]
    own = wanted[accelerator.process_index :: accelerator.num_processes]
    if wanted:
        accelerator.print(f"making {len(wanted)} images of {options.class_prompt!r} in {folder}")
    for start in tqdm(range(0, len(own), sampler.at_once), disable=not (own and accelerator.is_main_process)):
        some = own[start : start + sampler.at_once]
        encoded = sampler.encode([options.class_prompt] * len(some))
        for (_, path), picture in zip(some, sampler.draw(encoded, [number for number, _ in some]), strict=True):
            with replacing(path) as temporary:
                as_image(picture).save(temporary)
    accelerator.wait_for_everyone()
    return list_images(folder, "--class-data-dir")[: options.num_class_images]
