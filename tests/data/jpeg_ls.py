"""A plain JPEG-LS encoder (ITU-T T.87, Annex A) for films of any depth, because the libraries at hand do not write every one."""

import struct

import numpy as np
from numpy.typing import NDArray

RUN_ORDERS = (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 15)
RESET = 64


class Bits:
    """Bits to bytes; after 0xFF a zero bit is stuffed."""

    def __init__(self) -> None:
        self.data, self.byte, self.room = bytearray(), 0, 8

    def put(self, value: int, count: int) -> None:
        for place in reversed(range(count)):
            self.room -= 1
            self.byte |= (value >> place & 1) << self.room
            if not self.room:
                self.data.append(self.byte)
                self.room, self.byte = (7 if self.byte == 0xFF else 8), 0

    def finish(self) -> bytes:
        full = 7 if self.data and self.data[-1] == 0xFF else 8
        if self.room < full:
            self.data.append(self.byte)
        return bytes(self.data)


class Encoder:
    """One component without loss."""

    def __init__(self, bits: int) -> None:
        self.most, self.bits, self.out = (1 << bits) - 1, bits, Bits()
        self.limit = 2 * (max(2, bits) + max(8, bits))
        self.thresholds = self._thresholds()
        start = max(2, (self.most + 1 + 32) // 64)
        self.sums, self.biases, self.corrections, self.counts = [start] * 367, [0] * 365, [0] * 365, [1] * 367
        self.negatives, self.run_index = [0, 0], 0

    def _thresholds(self) -> tuple[int, int, int]:
        """C.2.4.1.1.1"""
        if self.most >= 128:
            factor = (min(self.most, 4095) + 128) // 256
            wanted = (factor * (3 - 2) + 2, factor * (7 - 3) + 3, factor * (21 - 4) + 4)
        else:
            factor = 256 // (self.most + 1)
            wanted = (max(2, 3 // factor), max(3, 7 // factor), max(4, 21 // factor))
        first = wanted[0] if 1 <= wanted[0] <= self.most else 1
        second = wanted[1] if first <= wanted[1] <= self.most else first
        return first, second, wanted[2] if second <= wanted[2] <= self.most else second

    def quantised(self, gradient: int) -> int:
        step = sum(abs(gradient) >= each for each in (1, *self.thresholds))
        return step if gradient >= 0 else -step

    def golomb(self, value: int, order: int, limit: int) -> None:
        high = value >> order
        if high < limit - self.bits - 1:
            self.out.put(1, high + 1)
            self.out.put(value & ((1 << order) - 1), order)
        else:
            self.out.put(1, limit - self.bits)
            self.out.put(value - 1, self.bits)

    def order(self, context: int, total: int) -> int:
        order = 0
        while self.counts[context] << order < total:
            order += 1
        return order

    def folded(self, error: int) -> int:
        """The error modulo the range, near 0."""
        size = self.most + 1
        error %= size
        return error - size if error >= (size + 1) // 2 else error

    def regular(self, value: int, left: int, above: int, corner: int, steps: tuple[int, int, int]) -> None:
        sign = -1 if next(step for step in steps if step) < 0 else 1
        context = abs(sign * (81 * steps[0] + 9 * steps[1] + steps[2]))
        low, high = min(left, above), max(left, above)
        guess = low if corner >= high else high if corner <= low else left + above - corner
        guess = min(max(guess + sign * self.corrections[context], 0), self.most)
        error = self.folded(sign * (value - guess))
        order = self.order(context, self.sums[context])
        turned = order == 0 and 2 * self.biases[context] <= -self.counts[context]
        mapped = (
            (2 * error + 1 if error >= 0 else -2 * (error + 1))
            if turned
            else (2 * error if error >= 0 else -2 * error - 1)
        )
        self.golomb(mapped, order, self.limit)
        self._update(context, error)

    def _update(self, context: int, error: int) -> None:
        self.biases[context] += error
        self.sums[context] += abs(error)
        if self.counts[context] == RESET:
            self.sums[context] >>= 1
            self.biases[context] >>= 1
            self.counts[context] >>= 1
        self.counts[context] += 1
        bias, count = self.biases[context], self.counts[context]
        if bias <= -count:
            self.biases[context] = max(bias + count, 1 - count)
            self.corrections[context] = max(self.corrections[context] - 1, -128)
        elif bias > 0:
            self.biases[context] = min(bias - count, 0)
            self.corrections[context] = min(self.corrections[context] + 1, 127)

    def run(self, length: int, to_end: bool) -> None:
        while length >= 1 << RUN_ORDERS[self.run_index]:
            self.out.put(1, 1)
            length -= 1 << RUN_ORDERS[self.run_index]
            self.run_index = min(self.run_index + 1, 31)
        if to_end:
            if length:
                self.out.put(1, 1)
            return
        self.out.put(0, 1)
        self.out.put(length, RUN_ORDERS[self.run_index])

    def after_run(self, value: int, left: int, above: int) -> None:
        kind = int(left == above)
        error = value - (left if kind else above)
        if not kind and left > above:
            error = -error
        error, context = self.folded(error), 365 + kind
        total = self.sums[context] + (self.counts[context] >> 1 if kind else 0)
        order = self.order(context, total)
        negatives = self.negatives[kind]
        flag = (order == 0 and error > 0 and 2 * negatives < self.counts[context]) or (
            error < 0 and (2 * negatives >= self.counts[context] or order != 0)
        )
        mapped = 2 * abs(error) - kind - int(flag)
        self.golomb(mapped, order, self.limit - RUN_ORDERS[self.run_index] - 1)
        self.negatives[kind] += error < 0
        self.sums[context] += (mapped + 1 - kind) >> 1
        if self.counts[context] == RESET:
            self.sums[context] >>= 1
            self.counts[context] >>= 1
            self.negatives[kind] >>= 1
        self.counts[context] += 1
        self.run_index = max(self.run_index - 1, 0)

    def line(self, row: list[int], before: list[int], first_corner: int) -> None:
        width, x = len(row), 0
        while x < width:
            left = row[x - 1] if x else before[0]
            above, corner = before[x], before[x - 1] if x else first_corner
            right = before[min(x + 1, width - 1)]
            steps = self.quantised(right - above), self.quantised(above - corner), self.quantised(corner - left)
            if any(steps):
                self.regular(row[x], left, above, corner, steps)
                x += 1
                continue
            start = x
            while x < width and row[x] == left:
                x += 1
            self.run(x - start, x == width)
            if x < width:
                self.after_run(row[x], left, before[x])
                x += 1


def encode_jpeg_ls(pixels_HW: NDArray[np.unsignedinteger], bits: int) -> bytes:
    """The stream of a grey film whose values have ``bits`` bits."""
    height, width = pixels_HW.shape
    encoder, before, corner = Encoder(bits), [0] * width, 0
    for row in pixels_HW.tolist():
        next_corner = before[0]
        encoder.line(row, before, corner)
        before, corner = row, next_corner
    frame = b"\xff\xf7" + struct.pack(">HBHHB", 11, bits, height, width, 1) + bytes([1, 0x11, 0])
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + bytes([1, 0, 0, 0, 0])
    return b"\xff\xd8" + frame + scan + encoder.out.finish() + b"\xff\xd9"
