"""CUDA schedule of the quantized layers: tiles of an implicit matrix product.

What is computed stands in ``mpqc/csrc/cuda_kernels.cuh`` for every tile alike; this module chooses
the tile. A block gathers words of pixels and weights into shared memory, two chunks in turn, and
multiplies them on the tensor cores or on the CUDA cores.
"""

from dataclasses import dataclass

SHARED_BYTES = 48 * 1024  # of a block, without asking the driver for more
PADDING = 4  # words behind each row in shared memory
ROWS_A_THREAD_ROW = 16  # the CUDA-core form has 16 rows of threads
COLUMNS_A_THREAD = 4
ENOUGH_BLOCKS = 128  # about one for every multiprocessor of a large GPU


@dataclass(frozen=True)
class ProductTile:
    """Tunables of a product kernel.

    Attributes:
        mma: on the tensor cores.
        rows, columns: results of a block: output pixels by channels; columns is a multiple of 32.
        depth: words of the reduction that lie in shared memory at a time, a multiple of 8.
        warp_rows, warp_columns: results of a warp on the tensor cores.
    """

    mma: bool
    rows: int
    columns: int
    depth: int
    warp_rows: int = 16
    warp_columns: int = 16

    @property
    def name(self) -> str:
        """As latency tables write it: rows x columns x words."""
        return f"{self.rows}x{self.columns}x{self.depth}"

    @property
    def threads(self) -> int:
        if self.mma:
            return self.rows // self.warp_rows * (self.columns // self.warp_columns) * 32
        return self.columns // COLUMNS_A_THREAD * ROWS_A_THREAD_ROW

    def shared_words(self, data_planes: int, weight_planes: int, sums: bool) -> int:
        """Shared memory of a block: two chunks, and afterwards the results in the same place."""
        chunk = (self.depth + PADDING) * (data_planes * self.rows + weight_planes * self.columns)
        return max(2 * chunk, self.rows * self.columns + (self.rows if sums else 0))


# In the order in which they are tried: large tiles read less memory, small ones fill the GPU.
_CUDA_CORES = ((64, 64), (32, 64), (64, 32), (32, 32), (16, 32))
_TENSOR_CORES = (
    (128, 64, 32, 32), (64, 64, 32, 32), (64, 32, 32, 16), (32, 64, 16, 32),
    (32, 32, 16, 16), (16, 32, 16, 8),
)  # fmt: skip


def product_tile(
    rows: int,
    columns: int,
    depth: int,
    planes: tuple[int, int],
    sums: bool,
    mma: bool,
    beside: int = 0,
) -> ProductTile:
    """Default tile, or one beside it.

    Args:
        rows: output pixels.
        columns: output channels of a group.
        depth: words of the reduction.
        planes: of data and weights; 1 for bytes.
        sums: the kernel also sums the codes under each window.
        mma: on the tensor cores.
        beside: so many places behind the default in the order of sizes: 1 is the next smaller.
    """
    tiles = _tiles(columns, depth, planes, sums, mma)
    enough = (
        index
        for index, tile in enumerate(tiles)
        if -(-rows // tile.rows) * -(-columns // tile.columns) >= ENOUGH_BLOCKS
    )
    least = max(
        range(len(tiles)), key=lambda i: (-tiles[i].rows * tiles[i].columns, tiles[i].depth)
    )
    return tiles[min(max(0, next(enough, least) + beside), len(tiles) - 1)]


def named_tile(
    name: str, columns: int, depth: int, planes: tuple[int, int], sums: bool, mma: bool
) -> ProductTile | None:
    """The tile of that ``ProductTile.name``, if a layer can have it; see ``product_tile``."""
    tiles = _tiles(columns, depth, planes, sums, mma)
    return next((tile for tile in tiles if tile.name == name), None)


def _tiles(
    columns: int, depth: int, planes: tuple[int, int], sums: bool, mma: bool
) -> list[ProductTile]:
    """Tiles that fit, each as deep as fits; large ones first."""
    fitting: dict[tuple[int, int], ProductTile] = {}
    for high, wide, *warp in _TENSOR_CORES if mma else _CUDA_CORES:
        for words in (32, 16, 8):
            tile = ProductTile(mma, high, wide, words, *warp)
            fits = 4 * tile.shared_words(*planes, sums) <= SHARED_BYTES
            if fits and words <= max(8, -(-depth // 8) * 8):
                fitting.setdefault((high, wide), tile)
    most = max(32, -(-columns // 32) * 32)
    return [t for t in fitting.values() if t.columns <= most] or list(fitting.values())
