"make bench finds every measurement; its numbers are not tested."

import importlib.util

from conftest import ROOT

NAMES = """read_patches_tiled_jpeg read_patches_svs read_patches_fallback read_patches_two_threads read_patches_of_limit decode_memory
read_manifest_100k mask_and_grid_100k tiling_memory_100k
embed_alexnet embed_alexnet_compiled embed_alexnet_of_limit embed_min_cosine embed_alexnet_float32 pretrain_float32 slide_to_features_float32 permutations_float32 cv_ragged import_features slide_to_features slide_to_features_of_limit
phantom_render phantom_render_40x phantom_write phantom_memory_16k cv_stacked heatmap_50k""".split()


def test_every_measurement_is_found():
    spec = importlib.util.spec_from_file_location("bench_run", ROOT / "benchmarks" / "run.py")
    run = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run)
    found = run.benchmarks()
    assert set(NAMES) <= set(found)
    assert run.main("no_such_name") == 2
