//! Ids: a type each, so that the compiler tells them apart. They have the bytes and the JSON of the number itself.

use bytemuck::{Pod, Zeroable};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! ids {
    ($($(#[$meta:meta])* pub struct $name:ident(pub $number:ty);)*) => {
        $(
            $(#[$meta])*
            #[repr(transparent)]
            #[derive(
                Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable, Serialize, Deserialize,
                JsonSchema,
            )]
            #[serde(transparent)]
            pub struct $name(pub $number);

            impl fmt::Display for $name {
                fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                    fmt::Display::fmt(&self.0, formatter)
                }
            }
        )*
    };
}

ids! {
    /// Slot of a topic in the region's table.
    pub struct TopicId(pub u32);

    /// Count of the topics that used a slot, or of the processes that ran under a broker id.
    pub struct Incarnation(pub u32);

    /// Slot of a broker in the region's table.
    pub struct BrokerId(pub u32);

    /// Name of a publisher, which it chose itself; never 0.
    pub struct ClientId(pub u64);

    /// Count of the sessions that used a row of the session table.
    pub struct Epoch(pub u32);

    /// Row of a session in the session table.
    pub struct SessionSlot(pub u32);

    /// Number under which a broker leads; it grows with each leader.
    pub struct Term(pub u64);

    /// One order of a topic: the global one, or a broker's own.
    pub struct Stream(pub u32);
}

/// Secret of a session. Its client has it from the leader, and shows it to publish, to go on and to close. Nothing prints it.
#[repr(transparent)]
#[derive(Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct SessionToken(pub u64);

impl fmt::Debug for SessionToken {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(if *self == Self::NONE { "none" } else { "secret" })
    }
}

impl SessionToken {
    /// Token of a client that has none, and of a session that nobody holds.
    pub const NONE: Self = Self(0);
}

impl TopicId {
    /// Index of the slot in a table.
    #[inline]
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl Incarnation {
    /// Count before the first.
    pub const NONE: Self = Self(0);

    /// Returns the number that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// Reads an incarnation from a word of the region; `None` when the word is too large.
    #[inline]
    #[must_use]
    pub fn from_word(word: u64) -> Option<Self> {
        u32::try_from(word).ok().map(Self)
    }

    /// Returns the word of the region that holds it.
    #[inline]
    #[must_use]
    pub const fn word(self) -> u64 {
        self.0 as u64
    }
}

impl BrokerId {
    /// Index of the slot in a table.
    #[inline]
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// Byte that names the broker in an index entry; 255, which no broker has, for an id that does not fit.
    #[inline]
    #[must_use]
    pub fn byte(self) -> u8 {
        u8::try_from(self.0).unwrap_or(u8::MAX)
    }
}

impl From<u8> for BrokerId {
    fn from(byte: u8) -> Self {
        Self(byte.into())
    }
}

impl Epoch {
    /// Returns the number that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl SessionSlot {
    /// Index of the row in a table.
    #[inline]
    #[must_use]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl Term {
    /// Number before the first leader.
    pub const NONE: Self = Self(0);

    /// Returns the number that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl Stream {
    /// Order over all brokers.
    pub const GLOBAL: Self = Self(u32::MAX);

    /// Order of one broker's own messages.
    #[inline]
    #[must_use]
    pub const fn of(broker: BrokerId) -> Self {
        Self(broker.0)
    }

    /// Broker whose own order it is; `None` for the global one.
    #[inline]
    #[must_use]
    pub const fn broker(self) -> Option<BrokerId> {
        match self {
            Self::GLOBAL => None,
            Self(broker) => Some(BrokerId(broker)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_the_global_one_or_a_brokers() {
        assert_eq!(Stream::GLOBAL.broker(), None);
        assert_eq!(Stream::of(BrokerId(3)).broker(), Some(BrokerId(3)));
    }

    #[test]
    fn a_token_is_never_printed() {
        assert_eq!(format!("{:?} {:?}", SessionToken(77), SessionToken::NONE), "secret none");
    }

    #[test]
    fn a_number_that_does_not_fit_names_nobody() {
        assert_eq!((BrokerId(31).byte(), BrokerId(256).byte()), (31, u8::MAX));
        assert_eq!(Incarnation::from_word(Incarnation(7).word()), Some(Incarnation(7)));
        assert_eq!(Incarnation::from_word(1 << 32), None);
        assert_eq!(Term(u64::MAX).next(), Term(u64::MAX));
    }
}
