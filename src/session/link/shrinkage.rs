//! Whether it is worth while to compress: what has not shrunk just now will hardly shrink now.

/// Remembers how well compression went.
#[derive(Clone, Copy, Debug)]
pub struct Shrinkage {
    /// Pieces that are not tried before one is again.
    left_out_max: u32,
    /// How often in a row it did not shrink.
    poor: u32,
    /// So often it is not tried now.
    left_out: u32,
}

impl Shrinkage {
    /// Nothing is known yet. Where nothing shrinks, so many pieces are left out before one is tried again.
    pub fn new(left_out_max: u32) -> Self {
        Self { left_out_max, poor: 0, left_out: 0 }
    }

    /// Whether to compress the next piece. To be asked once for each.
    pub fn is_worth_while(&mut self) -> bool {
        match self.left_out.checked_sub(1) {
            Some(left) => {
                self.left_out = left;
                false
            }
            None => true,
        }
    }

    /// So many bytes became so many.
    pub fn note(&mut self, before: u64, after: u64) {
        if after < before - before / WORTHWHILE_PART {
            *self = Self::new(self.left_out_max);
            return;
        }
        self.poor = self.poor.saturating_add(1);
        let pieces = 1_u32.checked_shl(self.poor).unwrap_or(u32::MAX);
        self.left_out = pieces.min(self.left_out_max);
    }
}

/// What shrinks by less than this part is sent as it is.
const WORTHWHILE_PART: u64 = 32;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_shrink_is_tried_less_and_less_often_and_at_once_when_it_does() {
        let mut shrinkage = Shrinkage::new(64);
        let mut tried = Vec::new();
        for piece in 0..400 {
            if shrinkage.is_worth_while() {
                tried.push(piece);
                shrinkage.note(1_000, 990);
            }
        }
        assert_eq!(tried, [0, 3, 8, 17, 34, 67, 132, 197, 262, 327, 392]);
        while !shrinkage.is_worth_while() {}
        shrinkage.note(1_000, 400);
        assert!((0..10).all(|_| shrinkage.is_worth_while()));
    }
}
