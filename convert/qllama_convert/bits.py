"""The one dense bit stream of GPTQ, compressed-tensors and (permuted) AWQ.

Element i of the packed axis occupies bits `[i*b, (i+1)*b)` of a stream cut into 32-bit words, the
lowest bits first, so at 4 bits element 0 is the low nibble of byte 0 of a little-endian word. The
words hold *unsigned* codes; `QTensor` holds signed ones, which are the same with the top bit of
every code flipped. All arrays are numpy; the packed axis is the last one. `bits` is 4 or 8.
"""

import numpy as np

_TOP_BITS = {4: 0x88, 8: 0x80}


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 `[R, >= ceil(count*bits/32)]` -> uint8 `[R, count]` of unsigned codes."""
    octets = _octets(words)
    if bits == 8:
        return octets[:, :count]
    return _nibbles(octets, count)


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 `[R, count]` of unsigned codes -> int32 `[R, ceil(count*bits/32)]`, padded with 0."""
    return _words(codes if bits == 8 else _join_nibbles(codes))


def codes_from_words(words: np.ndarray, bits: int, k: int) -> np.ndarray:
    """int32 `[N, ceil(K*bits/32)]` of unsigned codes -> the codes of a `QTensor`."""
    codes = _octets(words)[:, : -(-k * bits // 8)] ^ np.uint8(_TOP_BITS[bits])
    if bits == 8:
        return codes.view(np.int8)
    return _clear_padding(codes, k)


def words_from_codes(codes: np.ndarray, bits: int, k: int) -> np.ndarray:
    """The inverse of `codes_from_words`; bits past K are 0."""
    octets = codes.view(np.uint8) ^ np.uint8(_TOP_BITS[bits])
    return _words(octets if bits == 8 else _clear_padding(octets, k))


def pack_signed(values: np.ndarray) -> np.ndarray:
    """int8 `[N, K]` with values in [-8, 7] -> int4 codes of a `QTensor`, uint8 `[N, ceil(K/2)]`."""
    return _join_nibbles(values.view(np.uint8) & np.uint8(0xF))


def unpack_signed(codes: np.ndarray, k: int) -> np.ndarray:
    """The inverse of `pack_signed`: int8 `[N, K]`."""
    return ((_nibbles(codes, k) ^ np.uint8(8)).view(np.int8)) - np.int8(8)


def _octets(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint8)


def _words(octets: np.ndarray) -> np.ndarray:
    padding = -octets.shape[1] % 4
    if padding:
        octets = np.pad(octets, ((0, 0), (0, padding)))
    return np.ascontiguousarray(octets).view(np.int32)


def _nibbles(octets: np.ndarray, count: int) -> np.ndarray:
    pairs = np.stack([octets & np.uint8(0xF), octets >> np.uint8(4)], axis=-1)
    return pairs.reshape(octets.shape[0], -1)[:, :count]


def _join_nibbles(codes: np.ndarray) -> np.ndarray:
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))


def _clear_padding(octets: np.ndarray, k: int) -> np.ndarray:
    if k % 2:
        octets[:, -1] &= np.uint8(0xF)
    return octets
